"""Averages and their scores back into the trainer, over HTTP.

- `pull`: what `EmaClient.pull` returns: copies versions into a module after steps
- `fetch`: the thread that finds and downloads a version
- `average_reader`: reads one run's averages from the server
- `tensors`: whether weights fit a module, and the copy in place
- `module_copy`: a copy of a module that holds averaged weights, to validate and save
- `scores`: reads the scores of averages in a thread, for a log
"""
