"""The demonstration: new tasks without forgetting, against plain fine-tuning."""
