#!/usr/bin/env bash
# RL on a logic track (word problems with a calculator) and a chat track (instruction constraints), from one SFT start per seed: PPO and GRPO on logic,
# GRPO and online DPO on chat; then parallel RL both ways at equal rollouts: the two GRPO runs merged by every method of merge.py, and one run with
# both tracks. Also GRPO on the perfectible subset: training accuracy must pass .95. Two processes
# at a time; some two hours on 2 cores (an estimate: its runs were started one by one) after runs/replay_sweep.sh, whose models it starts from (else it trains them).
#     bash runs/parallel_rl.sh              SEEDS="0 1 2 3 4" PARALLEL="0 1 2" STEPS=30 bash runs/parallel_rl.sh
set -euo pipefail
cd "$(dirname "$0")/.."
SEEDS=${SEEDS:-"0 1 2 3 4"} PARALLEL=${PARALLEL:-"0 1 2"} STEPS=${STEPS:-30} PERFECTIBLE=${PERFECTIBLE:-"0 1 2"}
root=out/replay_sweep
mkdir -p $root out/parallel_rl
source runs/jobs.sh
for seed in $SEEDS; do spawn base $seed; done
join
for seed in $SEEDS; do spawn mid_varied $seed; done
join
sweep=$root root=out/parallel_rl

# SFT on a few word problems, and on instructions that most demonstrations follow carelessly: the model can do both, and often does not
start() {
    python runs/careless.py $root/careless_s$1.jsonl --share=.7 --seed=$1 > /dev/null
    train start_s$1 $shape --seed=$1 --init=$sweep/mid_varied_s$1 --data=toy/math_en,chat=$root/careless_s$1.jsonl --mix=math_en:.045,chat:.955 \
        --num_steps=240 --decay_share=.3
}
rl() {                                                # NAME SEED FLAGS...
    local name=$1 seed=$2; shift 2
    run train_rl.py ${name}_s$seed --seed=$seed --init=$root/start_s$seed --eval_every=1000 --eval_problems=200 --preflight=0 "$@"
}
# four updates a step: half the rate (at 1e-3 two of five seeds collapsed to 0)
ppo="--method=ppo --lr=5e-4 --num_steps=$STEPS --prompts_per_step=32 --group_size=4 --critic_lr=3e-3 --critic_warmup=5 --kl_coef=0"
for seed in $SEEDS; do spawn start $seed; done
join
for seed in $SEEDS; do spawn rl grpo_logic $seed --data=logic=math_en --prompts_per_step=16 --num_steps=$STEPS; done
for seed in $PARALLEL; do
    spawn rl joint $seed --data=logic=math_en,chat=chat_en --prompts_per_step=48 --track_mix=logic:1,chat:2 --num_steps=$STEPS
    spawn rl grpo_chat $seed --data=chat=chat_en --prompts_per_step=32 --num_steps=$STEPS
done
for seed in $SEEDS; do
    spawn rl ppo_logic $seed --data=logic=math_en $ppo
    spawn run train_dpo.py dpo_chat_s$seed --seed=$seed --init=$root/start_s$seed --data=chat_en --lr=3e-4 --decay_share=.3 --num_steps=$STEPS \
        --prompts_per_step=32 --eval_every=1000 --eval_problems=200
done
for seed in $PERFECTIBLE; do                          # prompts that are solved .2 to .8 of the time at the start
    spawn rl perfectible $seed --data=logic=math_en --num_prompts=100 --solve_samples=64 --prompts_per_step=16 --num_steps=40
done
join
python runs/parallel_rl_table.py $root --seeds="$SEEDS" --parallel="$PARALLEL"
