"""Draws timescales.png from results.jsonl, and prints the tables of the README.

python experiments/timescales/draw.py
"""

import matplotlib.pyplot as plt
from study import FOLDER, MEMORIES, lines

COLORS = {label: f"C{i}" for i, label in enumerate([*MEMORIES, "Mamba-2"])}


def of(found: list[dict], study: str, **wanted) -> list[dict]:
    return [
        line
        for line in found
        if line["study"] == study and all(line[key] == value for key, value in wanted.items())
    ]


def retention_table(found: list[dict]) -> str:
    rows = [
        "| memory | state bytes | gradient at lag 16 | 128 | 1,024 | capacity |",
        "|---|---|---|---|---|---|",
    ]
    for line in of(found, "retention"):
        by_lag = dict(zip(line["lags"], line["gradient"], strict=True))
        cells = " | ".join(f"{by_lag[lag]:.1e}" for lag in (16, 128, 1024))
        size, capacity = f"{line['state_bytes']:,}", f"{line['capacity']:.1f}"
        rows.append(f"| {line['memory']} | {size} | {cells} | {capacity} |")
    return "\n".join(rows)


def windows_table(found: list[dict]) -> str:
    rows = ["| memory | steps | N-parity | delayed match |", "|---|---|---|---|"]
    table: dict[tuple, dict] = {}
    for line in of(found, "windows"):
        table.setdefault((line["memory"], line["steps"]), {})[line["task"]] = line["solved"]
    for (memory, steps), solved in table.items():
        cells = " | ".join(str(solved.get(task, "-")) for task in ("parity", "delayed_match"))
        rows.append(f"| {memory} | {steps:,} | {cells} |")
    return "\n".join(rows)


def streams_table(found: list[dict]) -> str:
    lengths = sorted({int(length) for line in of(found, "streams") for length in line["tests"]})
    rows = [
        f"| task | memory | {' | '.join(f'{length:,}' for length in lengths)} |",
        f"|---|---|{'---|' * len(lengths)}",
    ]
    for line in of(found, "streams"):
        cells = [f"{line['tests'][str(n)]['accuracy']:.2f}" for n in lengths]
        rows.append(f"| {line['task']} | {line['memory']} | {' | '.join(cells)} |")
    return "\n".join(rows)


def draw(found: list[dict], path) -> None:
    figure, panels = plt.subplots(2, 2, figsize=(12, 7.6), layout="constrained")
    (gradient, probe), (windows, streams) = panels
    for line in of(found, "retention"):
        style = {"color": COLORS[line["memory"]], "label": line["memory"]}
        gradient.loglog(line["lags"][1:], line["gradient"][1:], **style)
        probe.semilogx(line["probe_lags"][1:], line["probe"][1:], **style)
    gradient.set(
        title="norm of d out[t + lag] / d x[t], at the start", xlabel="lag", ylim=(1e-6, 3)
    )
    probe.set(title="variance of u[t - lag] that out[t] tells", xlabel="lag", ylim=(-0.05, 1.05))
    probe.legend(frameon=False)
    for line in of(found, "windows", task="delayed_match"):
        share = [line["steps"] * i / len(line["newest"]) for i in range(len(line["newest"]))]
        windows.plot(share, line["newest"], color=COLORS[line["memory"]], label=line["memory"])
    for line in of(found, "windows", task="parity"):
        share = [line["steps"] * i / len(line["newest"]) for i in range(len(line["newest"]))]
        windows.plot(share, line["newest"], color=COLORS[line["memory"]], linestyle=":")
    windows.set(title="newest N: delayed match (lines), N-parity (dots)", xlabel="step", ylabel="N")
    for line in of(found, "streams"):
        dots = line["task"] == "selective_copying"
        lengths = [int(length) for length in line["tests"]]
        accuracy = [scores["accuracy"] for scores in line["tests"].values()]
        streams.semilogx(
            lengths,
            accuracy,
            ":o" if dots else "-o",
            color=COLORS[line["memory"]],
            label=f"{line['memory']}, {line['task'].replace('_', ' ')}",
        )
    streams.axvline(256, color="0.8", zorder=0)
    streams.set(title="trained up to 256 tokens", xlabel="length of the test", ylabel="accuracy")
    streams.legend(frameon=False)
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=90)


def main() -> None:
    found = lines()
    draw(found, FOLDER / "timescales.png")
    for table in (retention_table, windows_table, streams_table):
        print(table(found), end="\n\n")


if __name__ == "__main__":
    main()
