#!/usr/bin/env bash
# Everything about this package that has to be measured on a GPU, in order of worth, in a given time.
#
#   benchmarks/full_size.sh --output_dir out/full-size --minutes 240 --data_dir dreambooth
#   benchmarks/full_size.sh --dry_run
#
# --data_dir: the DreamBooth set, a folder of photographs for each subject; parts that need it are left out without.
# --model: what is finetuned with it. --python: the interpreter. --dry_run: say what would run.
#
# A part that is done is not run again, and the benchmarks go on row by row where they were stopped: give the same
# command again until nothing is left. Each writes JSON into the folder, from which
# `python benchmarks/plot.py --results_dir out/full-size --output_dir out/full-size` draws. Models come from the Hub.
set -euo pipefail
cd "$(dirname "$0")/.."

output_dir=out/full-size minutes=240 data_dir="" dry_run="" python=${PYTHON:-python}
model=stable-diffusion-v1-5/stable-diffusion-v1-5
while [ $# -gt 0 ]; do
  case "$1" in
    --dry_run) dry_run=yes; shift; continue ;;
    --output_dir | --minutes | --data_dir | --model | --python)
      [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; }
      declare "${1#--}=$2"; shift 2 ;;
    *) echo "error: $1: there are --output_dir, --minutes, --data_dir, --model, --python, --dry_run" >&2; exit 2 ;;
  esac
done
[[ $minutes =~ ^[1-9][0-9]*$ ]] || { echo "error: --minutes $minutes: needs a whole number above 0" >&2; exit 2; }
if [ -n "$data_dir" ] && [ ! -d "$data_dir" ]; then
  echo "error: --data_dir $data_dir: there is no such folder" >&2; exit 2
fi
if [ -z "$dry_run" ] && ! "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
  echo "error: PyTorch finds no GPU, and these sizes need one; --dry_run says what would run" >&2; exit 2
fi
[ -n "$dry_run" ] || mkdir -p "$output_dir/done"
ends=$(($(date +%s) + 60 * minutes)) unfinished=0

part() { # part NAME COMMAND...
  local name=$1 left
  shift
  if [ -n "$dry_run" ]; then echo "$name: $*"; return; fi
  if [ -e "$output_dir/done/$name" ]; then echo "== $name: done before"; return; fi
  left=$((ends - $(date +%s)))
  if [ $left -le 0 ]; then echo "== $name: no time left"; unfinished=1; return; fi
  echo "== $name: $*"
  # One that fails is no reason to leave out the others.
  if timeout --signal=INT --kill-after=60 "$left" "$@" 2>&1 | tee -a "$output_dir/$name.log"; then
    touch "$output_dir/done/$name"
  else
    echo "== $name: not finished"; unfinished=1
  fi
}

here=$python out=(--output_dir "$output_dir")
half=(--mixed_precision bf16 --resolution 512)
part speed "$here" benchmarks/training_step.py "${out[@]}" --workloads sd15-512 sdxl-1024 flux2-klein-512
part inference "$here" benchmarks/inference.py "${out[@]}" --workloads sd15-512 sdxl-1024
part launches "$here" benchmarks/launches.py "${out[@]}"
part memory "$here" benchmarks/memory.py "${out[@]}" --device cuda
part peft_image "$here" benchmarks/peft_image_benchmark.py "${out[@]}"
part serving "$here" benchmarks/serving.py "${out[@]}" --base "$model"
if [ -n "$data_dir" ]; then
  part learning_rates "$here" benchmarks/lr_robustness.py "${out[@]}" --base "$model" --data_dir "$data_dir" \
    --max_train_steps 400 "${half[@]}"
  part fronts "$here" benchmarks/fronts.py "${out[@]}" --results_dir "$output_dir"
  for method in ether_plus ether lora oft; do
    part "dreambooth_$method" "$here" benchmarks/dreambooth_eval.py --output_dir "$output_dir/dreambooth_$method" \
      --data_dir "$data_dir" --pretrained_model_name_or_path "$model" --method "$method" --resolution 512 \
      --max_train_steps 800
  done
else
  echo "(learning rates and the DreamBooth evaluation need --data_dir)"
fi
part control "$here" -m accelerate.commands.launch train_controlnet_ether.py \
  --pretrained_model_name_or_path "$model" --dataset_name fusing/fill50k --image_column image \
  --conditioning_image_column conditioning_image --caption_column text --output_dir "$output_dir/control" \
  --resolution 512 --mixed_precision bf16 --train_batch_size 4 --max_train_steps 5000 --checkpointing_steps 500 \
  --resume_from_checkpoint latest
exit $unfinished
