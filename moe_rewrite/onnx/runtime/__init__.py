"""Run exported files in ONNX Runtime."""
