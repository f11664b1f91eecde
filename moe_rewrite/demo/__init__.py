"""The demonstration: new tasks without forgetting, compared with fine-tuning."""
