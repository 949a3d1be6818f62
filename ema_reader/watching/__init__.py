"""Keeps a folder at the newest version of an average, and tells inference engines and commands: `ema watch`.

- `watch`: waits for versions, downloads them, and delivers them to targets
- `folder`: the folder: one subfolder for each version, the link `current`, and what was delivered
- `targets`: SGLang, vLLM, and a command
"""
