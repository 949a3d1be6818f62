"""Which byte is where: from the manifest to memory and to safetensors files.

- `dtypes`: wire dtypes as torch's
- `layout`: where each element lies in a snapshot and in an average's memory
- `selection`: which tensors an average averages
- `finite`: NaN and Inf in the tensors of a snapshot
- `file_plan`: which bytes of an average go where in its files
- `safetensors_file`: safetensors headers, and parts of files
"""
