# How a process of a job runs, in one place: the program, its container, the network. Sourced by launch.sh.
#
# CONTAINER=image.sqsh or docker://…   enroot and pyxis: srun starts every task in it
# CONTAINER=image.sif                  apptainer
# otherwise the virtual environment at VENV (default: .venv of the submit directory)
# ENGINE_CONTAINER                     the same for the engines' tasks; default: CONTAINER

: "${VENV:=$PWD/.venv}" "${MOUNTS:=$PWD}"

# in_place IMAGE: sets SRUN (what srun is given) and PROGRAM (how `megarl` is called).
in_place() {
    SRUN=() PROGRAM=("$VENV/bin/python" -m megarl.cli)
    case "$1" in
        "") ;;
        *.sif) PROGRAM=(apptainer exec --nv --bind "$MOUNTS" --pwd "$PWD" "$1" python -m megarl.cli) ;;
        *) SRUN=("--container-image=$1" "--container-mounts=$MOUNTS:$MOUNTS" "--container-workdir=$PWD")
           PROGRAM=(python -m megarl.cli) ;;
    esac
}

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
# A GPU's task gets its share of the node's cores, at most 8: for checksums, and for Adam where the optimizer is on the host.
threads=1
if ((${SLURM_GPUS_ON_NODE:-0} > 0)); then threads=$((${SLURM_CPUS_ON_NODE:-1} / SLURM_GPUS_ON_NODE)); fi
threads=$((threads > 8 ? 8 : threads < 1 ? 1 : threads))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}
# The network. Set FABRIC to the interface of the cluster's IP network when the host name's address is another one's,
# and NCCL_IB_HCA to the InfiniBand cards (e.g. mlx5) when a node has others beside them.
if [[ -n "${FABRIC:-}" ]]; then export NCCL_SOCKET_IFNAME=$FABRIC GLOO_SOCKET_IFNAME=$FABRIC; fi
export NCCL_DEBUG=${NCCL_DEBUG:-WARN} NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22} NCCL_IB_RETRY_CNT=${NCCL_IB_RETRY_CNT:-7}
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
