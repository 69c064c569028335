#!/usr/bin/env bash
exec srun --job-name=attempt-0007 --export=ALL --input=none --error=/runs/law/attempts/0007/node_%4t.log --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=32 --cpu-bind=none --kill-on-bad-exit=1 apptainer exec --nv --bind /runs:/runs,/data:/data:ro /images/ernie.sqsh python3 -m launcher.node /runs/law 7 --nodes 2 --ranks-per-node 8 --rendezvous 10.0.0.7:15665
