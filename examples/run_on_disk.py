"""A run on disk: interrupted, resumed, read back and verified without the model.

    python examples/run_on_disk.py

``"digits"`` may be ``"cifar10"``, ``"folder:PATH"`` or your own arrays: ``rsplugins.data.Dataset.from_arrays(images, labels)``.
"""

import rsplugins

classifier = rsplugins.load("zoo:digits-cnn.digits-gaussian025-v2")
data = rsplugins.load_data("digits")

# The same call goes on where it stopped; torchrun shares the inputs among its processes.
rsplugins.certify(classifier, data, "gaussian", sigma=0.25, n=2000, indices=data.select(stride=6), out="runs/example")

run = rsplugins.open_run("runs/example")
summary = run.summary()
print(f"{summary['guarantee']}: {summary['inputs']} inputs, average certified radius {summary['acr']:.3f}")
print(*[f"  l2 radius {point['radius']:.2f}: {100 * point['rate']:.1f} %" for point in summary["curve"]], sep="\n")
print("rsplugins verify runs/example", "rsplugins report runs/example", sep="\n")
