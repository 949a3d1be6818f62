"""Copies a version to a store outside: `ema push`.

- `push`: download, model card, and what goes where
- `stores`: file systems of fsspec (`file://`, `s3://`, …) and the Hugging Face Hub
"""
