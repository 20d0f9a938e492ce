"""Models for other programs: folders of transformers, adapters of PEFT, GGUF files of llama.cpp and Ollama."""
