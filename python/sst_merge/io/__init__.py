"""What comes in and goes out: adapters, models, prompts, folders."""
