"""Which byte is where: from the manifest to memory and to safetensors files."""
