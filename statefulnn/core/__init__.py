"""The object model: boxes, modules, split and merge. It knows nothing of layers or transforms.

Read in this order: stamps, ownership (who owns what), baked_in, box, generator, registry, objects,
static_keys, moduledef, plan, graph, pytree; then torch's surface: parameter, module, hooks, taps, state_dict,
placement.
"""
