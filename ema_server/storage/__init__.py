"""What lies on disk, and how it is read.

- `catalog`: which generations and versions are on disk
- `datadir`: the data folder
- `disk`: the few file operations that durability is built from
- `generation`: a generation's folder, read
- `records`: what stands in `generation.json` and `version.json`
"""
