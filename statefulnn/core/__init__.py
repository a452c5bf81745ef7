"""The object model: boxes, modules, split and merge. It knows nothing of layers or transforms.

Read in this order: ownership (who owns what), arrays, box, parameter, freeze, registry, moduledef, plan,
graph, pytree, generator; then torch's surface: module, hooks, state_dict, placement.
"""
