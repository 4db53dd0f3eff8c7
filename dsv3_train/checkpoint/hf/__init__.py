"""Between Hugging Face's DeepSeek-V3 files and this project's checkpoints, both ways."""
