"""Run a suite, look at its tables as DataFrames, and draw one plot: the cells of a first notebook."""

import sys

from matplotlib.figure import Figure

from harness import api

results = api.run("smoke", executor="serial", runs=sys.argv[1] if len(sys.argv) > 1 else "runs")
print(results.leaderboard[["task", "defense", "attack", "metric", "step", "target_defended", "sgr", "valid"]])
print(results.compare("imma", "none")[["task", "metric", "step", "stronger_by", "verdict"]])
print(results.images(defense="imma", attack="lora", step=3)["path"].tolist())

figure = Figure(layout="constrained")
axis = figure.subplots()
shown = results.leaderboard.query("task == 'relearning' and metric == 'clip_image'")
for defense, line in shown.groupby("defense"):
    axis.plot(line["step"], line["target_defended"], marker="o", label=defense)
axis.set(xlabel="attack step", ylabel="similarity to the target")
figure.legend()
figure.savefig(results.folder / "notebook.png")
