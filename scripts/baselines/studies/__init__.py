"""Whole studies in PyTorch, a file each.

Each has two functions of a job (see `baselines/__main__.py`): `notebook`, as the study was published, with whole models
of transformers, hooks, loops and lists of arrays; and `tuned`, as an expert in PyTorch would compute it:
studies of weights read the tensors that they need and build no model, studies of activations run the base model in
inference mode and reduce each layer in its hook. Both return `{figure: {array: values}}` with the names of the
package's own `.npz` files, so that the numbers can be compared; a study may leave figures out.
"""
