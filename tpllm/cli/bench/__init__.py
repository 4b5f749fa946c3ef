"""`tpllm bench`: the offline workloads, and a client that loads a server."""

from tpllm.cli.bench import offline, serve
from tpllm.cli.command import Commands, add_group


def add(commands: Commands) -> None:
    workloads = add_group(commands, "bench", "measure an engine, or any OpenAI-compatible server")
    offline.add(workloads)
    serve.add(workloads)
