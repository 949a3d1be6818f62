"""Which byte is where: from the manifest to memory and to safetensors files.

- `dtypes`: wire dtype names as torch's dtypes
- `file_plan`: the safetensors files of an average, as plans
- `layout`: where each element lies
- `safetensors_file`: a `model.safetensors` as it lies on disk
- `selection`: what an average does with each tensor
"""
