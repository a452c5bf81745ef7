"""The object model: boxes, modules, split and merge. It knows nothing of layers or transforms.

Read in this order: box (the terms), module, freeze, graph, generator, hooks, state_dict.
"""
