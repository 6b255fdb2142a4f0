#!/usr/bin/env bash
# Rejection-sampling SFT from few demonstrations, and its controls: kept answers that change problems, and a grader that is always right.
# Word problems whose calculator has other names in every prompt; measured on new numbers, new wording and new pairs of names, by round.
# Two processes at a time; about 15 minutes on 2 cores for 3 seeds after runs/replay_sweep.sh, whose models it starts from (else it trains them); results in out/rounds_$DEMOS.
#     bash runs/rounds.sh                            SEEDS="0 1 2" DEMOS=32 STEPS=80 ROUNDS=3 bash runs/rounds.sh
set -euo pipefail
cd "$(dirname "$0")/.."
SEEDS=${SEEDS:-"0 1 2"} DEMOS=${DEMOS:-32} STEPS=${STEPS:-80} ROUNDS=${ROUNDS:-3}
root=out/replay_sweep
into=rounds_$DEMOS
mkdir -p $root out/$into
source runs/jobs.sh
for seed in $SEEDS; do spawn base $seed; done
join
for seed in $SEEDS; do spawn mid_varied $seed; done
join
rounds() {                                            # NAME SEED FLAGS...
    local name=$1 seed=$2; shift 2
    if [ ! -e out/$into/$name/rounds.json ]; then
        python train_sft.py --name=$into/$name --seed=$seed --init=$root/mid_varied_s$seed --data=toy/schema --num_demos=$DEMOS --num_steps=$STEPS \
            --seq_len=416 --device_batch_size=8 --total_batch_size=3328 --eval_every=0 --decay_share=.3 --pool=schema --num_prompts=300 --early_stop=false \
            --eval_tasks=schema,schema@test_template,schema@test_schema --eval_problems=200 "$@" > out/$into/$name.log 2>&1 \
            || { tail -n 5 out/$into/$name.log; exit 1; }
    fi
    echo "$(date +%H:%M) $name: $(tail -n 1 out/$into/$name.log | cut -c1-300)"
}
for seed in $SEEDS; do spawn rounds plain_s$seed $seed --rounds=$ROUNDS --overwrite; done
join
# a control differs in what is kept after round 0, so it goes on from that round's model and answers
for seed in $SEEDS; do
    for control in shuffled always_right; do
        folder=out/$into/${control}_s$seed
        if [ ! -e $folder/rounds.json ]; then rm -rf $folder && mkdir -p $folder && cp -r out/$into/plain_s$seed/round_0 $folder/; fi
        spawn rounds ${control}_s$seed $seed --rounds=1 --control=$control --resume=latest
    done
done
join
python runs/rounds_table.py out/$into/*_s[0-9]/
