"""Averages back into the trainer, over HTTP.

- `average_reader`: reads one run's averages from the server: the only module here that reads
- `module_copy`: a copy of a module that holds averaged weights, to validate and save
"""
