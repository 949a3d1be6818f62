"""The evaluation worker, and the functions of the user that it calls. Only `batchnorm` imports torch.

- `worker`: takes leases of versions, evaluates them and reports the results
- `user_function`: imports the user's function and checks what it returns
- `batchnorm`: recomputes BatchNorm statistics under averaged weights
"""
