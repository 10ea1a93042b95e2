"""The command that writes what a cluster's scheduler needs to run a job."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from atoll.console.terminal import of

app = typer.Typer(no_args_is_help=True, help="Run jobs on clusters that schedule by themselves.")


@app.callback()
def cluster() -> None:
    """Run jobs on clusters that schedule by themselves."""


@app.command()
def manifest(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A job document.", show_default=False)],
    kind: Annotated[Literal["kuberay", "slurm"], typer.Option(help="What it is for.")] = "kuberay",
    nodes: Annotated[
        int, typer.Option(help="Nodes with ranks; 0: one for each rank that the job's layout pins.", min=0)
    ] = 0,
    cpus: Annotated[int, typer.Option(help="Processors of each.", min=1)] = 4,
    gpus: Annotated[int, typer.Option(help="Accelerators of each.", min=0)] = 0,
    image: Annotated[str, typer.Option(help="The pods' image, with Ray and Atoll in it.")] = "",
) -> None:
    """Print a KubeRay RayJob, or a Slurm script, that starts a Ray for this job and runs it there.

    The site is made beforehand on a volume that all nodes see; see docs/clusters.md.

    Example: atoll cluster manifest job.yaml --kind slurm --nodes 2 --gpus 4
    """
    from atoll.console.document import load_job
    from atoll.console.manifests import Nodes, kuberay, slurm
    from atoll.spec.job import TrainJob

    job, bundle = load_job(file)
    pinned = job.layout.ranks if isinstance(job, TrainJob) and job.layout is not None else 1
    asked = Nodes(count=nodes or pinned, cpus=cpus, gpus=gpus, image=image)
    written = kuberay(job, bundle, asked) if kind == "kuberay" else slurm(job, file, of(context).home, asked)
    sys.stdout.write(written)
