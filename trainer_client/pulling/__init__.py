"""Averages and their scores back into the trainer, over HTTP.

- `average_reader`: reads one run's averages from the server
- `module_copy`: a copy of a module that holds averaged weights, to validate and save
- `scores`: reads the scores of averages in a thread, for a log
"""
