"""The table of `memseq layers`: every layer with its memory, state bytes, paper and forms."""

import argparse
import importlib

from memseq.layers import CHANNEL_LAYERS, CROSS_LAYERS, REGISTRY, SET_LAYERS, SHARED_LAYERS


def rows(features: int, context: int) -> list[dict[str, str]]:
    """One row a layer. State bytes: of one sequence at `features`, after `context` positions."""
    found = []
    for kind, registry in (
        ("causal", REGISTRY),
        ("shared", SHARED_LAYERS),
        ("set", SET_LAYERS),
        ("channel", CHANNEL_LAYERS),
        ("cross", CROSS_LAYERS),
    ):
        for name, constructor in registry.items():
            layer = constructor(features=features)
            forms = getattr(layer, "FORMS", ("reference",))
            if layer.OPERATION is not None:
                operation = importlib.import_module(f"memseq.pallas_kernels.{layer.OPERATION}")
                forms = operation.FORMS.available
            state = f"{layer.state_bytes(1, context):,}" if hasattr(layer, "state_bytes") else "-"
            found.append(
                {
                    "layer": name,
                    "kind": kind,
                    "memory": layer.MEMORY,
                    "state bytes": state,
                    "operation": layer.OPERATION or "-",
                    "forms": ", ".join(forms),
                    "paper": layer.PAPER,
                }
            )
    return found


def main(args: argparse.Namespace) -> int:
    """Prints the table."""
    table = rows(args.features, args.context)
    columns = list(table[0])
    widths = {c: max(len(c), *(len(row[c]) for row in table)) for c in columns}
    print(
        f"State bytes of one sequence, features {args.features}, "
        f"after {args.context:,} positions:\n"
    )
    for row in ({c: c for c in columns}, *table):
        print("  ".join(row[c].ljust(widths[c]) for c in columns).rstrip())
    return 0
