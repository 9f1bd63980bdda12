"""Tasks of lm-evaluation-harness on our models; see docs/evaluation.md.

`program.prepare` makes tasks ready and `Harness.run` asks a model; `model.JaxLM` is the model as the harness sees it.
The harness is an optional library (`pip install 'tessera[harness]'`), and nothing here imports it before a task needs
it.
"""
