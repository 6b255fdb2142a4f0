# Sourced by the studies: a training run that is skipped when it has finished, and jobs, two at a time. $root is the folder of the study.
export OMP_NUM_THREADS=1 WANDB_MODE=disabled
if [ -x .venv/bin/python ]; then export PATH="$PWD/.venv/bin:$PATH"; fi

# run SCRIPT NAME FLAGS... : its output goes to $root/NAME.log
run() {
    local script=$1 name=$2; shift 2
    if ! tail -n 1 "$root/$name.log" 2>/dev/null | grep -q '"checkpoint"'; then
        python $script --name=${root#out/}/$name --overwrite "$@" > "$root/$name.log" 2>&1 || { tail -n 5 "$root/$name.log"; exit 1; }
    fi
    echo "$(date +%H:%M) $name: $(tail -n 1 "$root/$name.log" | cut -c1-300)"
}
train() { run train_sft.py "$@"; }
# starts a job when fewer than two (JOBS) are running
spawn() { while [ "$(jobs -rp | wc -l)" -ge "${JOBS:-2}" ]; do wait -n; done; "$@" & }
join() { while [ "$(jobs -rp | wc -l)" -gt 0 ]; do wait -n; done; }

# where both studies start: a base that knows Python text and made-up facts, and the same mid-trained on reasoning in varied wordings
old=toy/facts_en,toy/facts_ko,toy/text_en,toy/text_ko,stdlib
oldmix=facts_en:.35,facts_ko:.3,text_en:.05,text_ko:.05,stdlib:.25                  # of the replayed tokens
shape="--seq_len=384 --device_batch_size=8 --total_batch_size=3072 --eval_every=0"
base() { train base_s$1 $shape --seed=$1 --data=$old --mix=facts_en:.2,facts_ko:.2,text_en:.1,text_ko:.1,stdlib:.4 --num_steps=150; }
mid_varied() {
    train mid_varied_s$1 $shape --seed=$1 --init=$root/base_s$1 --data=toy/reasoning_varied --replay_data=$old --replay=.20 --mix=$oldmix \
        --new_tokens=${VARIED_TOKENS:-1800000}
}
