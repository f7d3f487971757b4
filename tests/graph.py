"""Reading autograd's graph: which of the project's functions computed an output."""

from collections import Counter

from torch import Tensor


def joint_functions(output: Tensor) -> Counter[str]:
    """Count the functions behind ``output`` that stand for layers computed together, or for a norm."""
    waiting, seen = [output.grad_fn], set()
    found: Counter[str] = Counter()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found[node.name()] += 1
        waiting += [following for following, _ in node.next_functions]
    return Counter({name: found[name] for name in ("_LoRALinearsBackward", "_GatedMLPBackward", "_RMSNormBackward")})
