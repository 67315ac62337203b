"""what an adapter is exported as: LoRA, dense model, GGUF"""
