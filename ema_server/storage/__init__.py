"""What is on disk, and how it is read.

- `disk`: durable file operations, and whether a folder has room and can be written
- `catalog`: generations and versions as values, and which of them exist
- `records`: the content of `generation.json` and `version.json`
- `generation`: a generation's folder, read and verified
- `datadir`: the data folder: lock, format, the folders of its runs
- `companions`: files that a trainer wants to have in every version
- `usage`: how much disk space each run takes
"""
