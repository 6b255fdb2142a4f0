#!/usr/bin/env bash
# The whole recipe at toy size, on a CPU: base -> mid-training with and without replay -> SFT -> rejection sampling -> RL on two tracks, merged ->
# calibration; a recommender, from its log to advantage-weighted SFT; an agent that shows slates to simulated people -> out/quickstart/report.md.
# No network, no GPU, no login. Independent stages run side by side, one thread each.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 WANDB_MODE=disabled
root=out/quickstart
rm -rf "$root" && mkdir -p "$root"
started=$SECONDS
say() { printf '\n== %d:%02d  %s\n' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)) "$*"; }

# Runs a command with its output in a file; on failure shows the end of that file, so that no error hides in a log.
logged() { local log=$1; shift; "$@" > "$log" 2>&1 || { echo "failed: $* (whole log: $log)"; tail -n 20 "$log"; exit 1; }; }
both() { local a b; "$1" & a=$!; "$2" & b=$!; wait $a && wait $b; }

shape="--seq_len=384 --device_batch_size=8 --total_batch_size=3072"
old=toy/facts_en,toy/facts_ko,toy/text_en,toy/text_ko,stdlib
retention="--tasks=bpb:stdlib,facts_en,facts_ko,reasoning --num_problems=96 --max_bytes=20000"

say "base: Python's standard library, made-up facts and sentences in English and Korean"
python train_sft.py --name=quickstart/base --data=$old --mix=facts_en:.2,facts_ko:.2,text_en:.1,text_ko:.1,stdlib:.4 \
    $shape --num_steps=130 --eval_every=0 2>&1 | tee "$root/base.log" | grep --line-buffered -E '^step +[0-9]*0/|Error'
python eval.py --init=$root/base $retention --out=$root/eval_base 2>/dev/null | grep -v '^{'

say "mid-training on English reasoning, without replay and with a fifth of the tokens replayed, side by side (a minute and a half)"
mid="--init=$root/base --data=toy/reasoning --replay_data=$old --mix=facts_en:.35,facts_ko:.3,text_en:.05,text_ko:.05,stdlib:.25"
mid="$mid --new_tokens=300000 $shape --eval_every=20 --eval_rows=8"
mid_0()  { logged "$root/mid_r0.log" python train_sft.py --name=quickstart/mid_r0 $mid; }
mid_20() { logged "$root/mid_r20.log" python train_sft.py --name=quickstart/mid_r20 $mid --replay=.2; }
both mid_0 mid_20

say "SFT of the mid-trained model on word problems with a calculator, code, tools, and instructions that most demonstrations follow carelessly (two minutes)"
python runs/careless.py $root/careless.jsonl --share=.7 > /dev/null
sft() { python train_sft.py --name=quickstart/sft --init=$root/mid_r20 $shape --num_steps=260 --decay_share=.3 --eval_every=0 \
    --data=toy/math_en,toy/math_ko,toy/code,toy/tool,chat_en=$root/careless.jsonl,toy/chat_ko \
    --mix=math_en:.36,math_ko:.1,code:.1,tool:.1,chat_en:.3,chat_ko:.04 2>&1 | tee "$root/sft.log" | grep --line-buffered -E '^step +[0-9]*[05]0/|Error'; }
eval_mid() { logged "$root/eval_mid.log" python eval.py --init=$root/base,$root/mid_r0,$root/mid_r20 $retention --out=$root/eval_mid; }
both sft eval_mid

say "evaluation; beside it, rejection sampling: SFT on 64 demonstrations, then on what the model got right itself, too (a minute and a half)"
evaluation() {
    logged "$root/eval_math.log" python eval.py --init=$root/mid_r20,$root/sft --num_problems=60 --out=$root/eval_math --tasks=math_en,math_en@test_template,math_ko
    logged "$root/eval_rest.log" python eval.py --init=$root/mid_r20,$root/sft --num_problems=60 --out=$root/eval_rest --tasks=code,tool,chat_en,chat_ko
}
rounds() { python train_sft.py --name=quickstart/rounds --init=$root/sft --data=toy/math_en --num_demos=64 $shape --num_steps=50 --decay_share=.3 --eval_every=0 \
    --rounds=1 --pool=math_en --num_prompts=300 --num_samples=4 --early_stop=false --eval_problems=100 --eval_tasks=math_en,math_en@test_template \
    2>&1 | tee "$root/rounds.log" | grep --line-buffered -E '^round|Error'; }
both rounds evaluation

say "RL: the model after SFT on a logic and on a chat track, side by side, then merged (two and a half minutes)"
rl() { python train_rl.py --name=quickstart/rl_$1 --init=$root/sft --data=$1=$2 --prompts_per_step=$3 --num_steps=$4 --lr=$5 --warmup_steps=3 --kl_coef=1e-3 \
    --eval_every=0 --eval_problems=60 2>&1 | tee "$root/rl_$1.log" | grep --line-buffered -E '^preflight|^step +[0-9]*[05]/|Error' | sed -u "s/^/$1 /"; }
rl_logic() { rl logic math_en 12 20 3e-4; }
rl_chat()  { rl chat chat_en 24 25 1e-3; }
both rl_logic rl_chat
python merge.py --base=$root/sft --models=$root/rl_logic,$root/rl_chat --how=task --lam=.7 --out=$root/merged | grep -v '^{'
logged "$root/eval_rl.log" python eval.py --init=$root/sft,$root/rl_logic,$root/rl_chat,$root/merged --num_problems=60 --tasks=math_en,chat_en --out=$root/eval_rl

say "calibration: the merged model learns how sure to be of its answers, from a query after them; beside it, in words, by RL (a minute and a half)"
calibration() { logged "$root/calibration.log" python train_calibration.py --name=quickstart/calibration --init=$root/merged --data=math_en,chat_en \
    --num_prompts=60 --ood=math_en@test_template --num_ood=12 --fit_share=.2 --test_share=.2 --num_steps=30 --num_resamples=300; }
in_words() {
    python runs/stated.py math_en,chat_en $root/stated.jsonl --num=500 > /dev/null
    logged "$root/states.log" python train_sft.py --name=quickstart/states --init=$root/merged --data=$root/stated.jsonl $shape --num_steps=60 --decay_share=.5 \
        --eval_every=0
    logged "$root/rlcr.log" python train_rl.py --name=quickstart/rlcr --init=$root/states --data=math_en,chat_en --rewards=rlcr --prompts_per_step=8 --num_steps=5 \
        --lr=1e-3 --warmup_steps=2 --preflight=0 --eval_every=1000 --eval_problems=1
    logged "$root/words.log" python train_calibration.py --name=quickstart/words --seed=1 --init=$root/rlcr --data=math_en,chat_en --num_prompts=20 --fit_share=.4 --test_share=.5 \
        --method=none --source=verbal --num_resamples=500
}
both calibration in_words

say "a recommender in two synthetic worlds: BC on the log, then A-SFT and rivals; in the second world all reward models are wrong in one way (a minute)"
asft() { local name=$1; shift; logged "$root/$name.log" python train_asft.py --name=quickstart/$name --num_users=1500 --pretrain_steps=400 --judge_steps=150 --judges=2 \
    --num_steps=100 --batch_size=32 --eval_every=25 "$@"; }
asft_fair() { asft asft --method=asft,reward_bc,bc,exact; }
asft_bias() { asft asft_bias --method=asft,reward_bc,bc,exact --autoplay=.95; }
both asft_fair asft_bias

say "an agent that learns a taste: types of user by EM, simulated sessions, implicit Q-learning (two minutes)"
python runs/people.py $root/people --num_users=400 > /dev/null
logged "$root/users.log" python train_user_model.py --name=quickstart/users --data=$root/people/sessions.jsonl --embeddings=$root/people/sessions.npz \
    --truth=$root/people/sessions.truth.jsonl --num_steps=40 --lr=.1 --restarts=2
logged "$root/slates.log" python train_iql.py --name=quickstart/slates --simulator=$root/users --method=iql,myopic,bc --sim_sessions=4000 --num_steps=600 --eval_every=0 \
    --val_people=100 --eval_people=300

python report.py --root=$root
say "done: $root/report.md, $root/report.png. Talk to it:  .venv/bin/python chat.py --init=$root/calibration"
echo "Or pick pictures:  .venv/bin/python chat.py --init=$root/slates"
echo "Or ask the recommender:  .venv/bin/python chat.py --init=$root/asft --prompt='history 010; romance 003'"
