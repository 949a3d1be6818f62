#!/usr/bin/env bash
# Takes docker-compose.yml through its whole life on the Docker engine that is there, and says what it does:
# built, up, trained, evaluated, a checkpoint downloaded by curl and loaded, down, up with the run still there, SIGTERM
# in the middle of a run with everything published. Exit code 0 when all of it held.
#
#   scripts/compose-check.sh
#
# It has a project, a token, ports and volumes of its own, and removes them at the end; the images stay, for the next
# time. Needs bash, curl, and docker with compose. BASE_IMAGE, TORCH_VERSION, TORCH_INDEX: see the Dockerfile.
set -euo pipefail
cd "$(dirname "$0")/.."

STEPS=1000
AVERAGE=ema-0.99
WAIT_S=300
INDEX=https://download.pytorch.org/whl/cpu

export COMPOSE_PROJECT_NAME=ema-check-$$ COMPOSE_FILE=docker-compose.yml:scripts/compose-check.yml COMPOSE_PATH_SEPARATOR=:
EMA_TOKEN=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
export EMA_TOKEN HTTP_PORT=0 ZMQ_PORT=0 CHECK_STEPS=$STEPS DEMO_STEPS=$STEPS EMA_PUBLISH_EVERY_STEPS=$((STEPS / 5))
export EMA_PUBLISH_EVERY_SECONDS=0 # so that what is published at the end is the end's doing
unset EMA_ALLOWED_HOSTS EMA_KEEP_GENERATIONS EMA_KEEP_SHORT_RUNS EMA_SHORT_RUN_STEPS EMA_RING_SIZE EMA_RING_EVERY_STEPS EMA_RING_DTYPE EMA_LOST_AFTER_SECONDS EMA_CHUNK_BYTES EMA_SHM_UIDS
unset EMA_DEVICE EMA_KERNEL EMA_NICE EMA_EVALUATE EMA_EVALUATE_DEVICE EMA_EVALUATE_EVERY_VERSIONS EMA_LOG_LEVEL

if docker compose version >/dev/null 2>&1; then
  compose() { docker compose "$@"; }
else
  compose() { docker-compose "$@"; }
fi
demo_compose() { COMPOSE_PROJECT_NAME=ema-check-demo-$$ COMPOSE_FILE=docker-compose.demo.yml compose "$@"; }

started_s=$SECONDS
folder=$(mktemp -d)
say() { printf '%4d s  %s\n' $((SECONDS - started_s)) "$*"; }
fail() {
  say "FAILED: $*"
  compose ps >&2 || true
  compose logs --no-color --tail=20 >&2 || true
  exit 1
}
clean_up() {
  local code=$?
  ((code == 0)) || say "ended with exit code $code; what it made is removed"
  for each in compose demo_compose; do
    $each down --volumes --remove-orphans >"$folder/down.log" 2>&1 || cat "$folder/down.log" >&2
  done
  rm -rf "$folder"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

quietly() { # a command whose output only matters when it fails
  "$@" >"$folder/output.log" 2>&1 || { cat "$folder/output.log" >&2; fail "$*"; }
}
container() { compose ps --all --quiet "$1" | head -n 1; }
state() { docker inspect --format "{{.State.$2}}" "$1"; }
server() { docker exec "$ema" "$@"; }
run_field() { # of the run $1, the field $2; 0 where it has no value yet
  server ema status "$1" --json | server_python "print(json.load(sys.stdin)['runs'][0]['$2'] or 0)"
}
server_python() { docker exec --interactive "$ema" python -c "import json, sys; $1"; }
get() { curl --fail --silent --show-error --location --noproxy '*' --header "Authorization: Bearer $EMA_TOKEN" "$@"; }

await() { # what is waited for, then a command that succeeds when it is there
  local until_s=$((SECONDS + WAIT_S)) what=$1
  shift
  until "$@"; do
    ((SECONDS < until_s)) || fail "$what did not happen within $WAIT_S s"
    sleep 0.5
  done
}
is_healthy() { [[ $(state "$ema" Health.Status) == healthy ]]; }
has_ended() { [[ $(state "$1" Status) == exited ]]; }
has_passed() { # the run $1, which need not exist yet, the step $2
  local step
  step=$(run_field "$1" step 2>/dev/null) && ((step > $2))
}

up() {
  quietly compose up --detach ema
  ema=$(container ema)
  await "a healthy server" is_healthy
  address=$(compose port ema 8080)
  base=http://$address/v1/runs
}

build() {
  if [[ -z ${TORCH_INDEX+set} ]] && ! curl --fail --silent --max-time 5 --output /dev/null "$INDEX/torch/"; then
    say "PyTorch's CPU index does not answer; torch comes from the plain index"
    export TORCH_INDEX=
  fi
  say "building the images"
  quietly compose build
  quietly demo_compose build
  for image in ema-sidecar ema-sidecar-demo; do
    say "  $image: $(($(docker image inspect --format '{{.Size}}' $image) / 1000000)) MB"
  done
}

contained() {
  [[ $(server id -u) == 10001 ]] || fail "the server does not run as user 10001"
  ! server touch /opt/ema/written 2>/dev/null || fail "the server can write to its image"
  server touch /data/written /tmp/written || fail "the server cannot write to /data and /tmp"
  [[ $address == 127.0.0.1:* ]] || fail "the server listens on $address"
  [[ $(compose port ema 5555) == 127.0.0.1:* ]] || fail "trainers can connect from other machines"
  local code
  code=$(curl --silent --noproxy '*' --output /dev/null --write-out '%{http_code}' "$base")
  [[ $code == 401 ]] || fail "without a token the server answers $code"
  say "  user 10001, read-only root, ports on 127.0.0.1 only, 401 without the token"
}

trained() {
  quietly compose up --detach trainer evaluator
  local service id
  for service in trainer evaluator; do
    id=$(container $service)
    await "the end of the $service" has_ended "$id"
    [[ $(state "$id" ExitCode) == 0 ]] || fail "the $service ended with exit code $(state "$id" ExitCode)"
  done
  [[ $(run_field demo state) == finished ]] || fail "the run is $(run_field demo state)"
  [[ $(run_field demo applied) == "$STEPS" ]] || fail "$(run_field demo applied) of $STEPS steps are averaged"
  say "  $STEPS steps averaged; $(get "$base/demo/metrics" | server_python "
rows = json.load(sys.stdin)['metrics']
print(len(rows), 'versions evaluated')")"
}

download() { # to the file $1
  get --output "$1.json" "$base/demo/averages/$AVERAGE/versions/latest"
  get --output "$1" "$base/demo/averages/$AVERAGE/versions/latest/files/model.safetensors"
}

loads() { # what the evaluator said of the file $1 is what a process without a network finds in it
  local reported measured run_alone="docker run --rm --interactive --network none --read-only --tmpfs /tmp"
  reported=$(get "$base/demo/metrics" | server_python "
rows = json.load(sys.stdin)['metrics']
print(max((row['step'], row['metrics']['accuracy']) for row in rows if row['average'] == '$AVERAGE')[1])")
  measured=$($run_alone --entrypoint python ema-sidecar-demo -c '
import sys
from safetensors.torch import load
from ema_cli.demo.evaluate import accuracy
print(accuracy(load(sys.stdin.buffer.read()))["accuracy"])' <"$1")
  [[ $measured == "$reported" ]] || fail "the downloaded file scores $measured, the evaluator reported $reported"
  say "  $(wc -c <"$1") bytes; accuracy $measured, as the evaluator reported"
}

interrupted() { # SIGTERM in the middle of a run
  quietly compose run --detach trainer --run interrupted --steps 1000000 --seed 1
  await "step 300 of a second run" has_passed interrupted 300
  quietly docker kill "$(docker ps --quiet --filter "label=com.docker.compose.project=$COMPOSE_PROJECT_NAME" \
    --filter "label=com.docker.compose.service=trainer")"
  local step published grace_s term_s
  step=$(run_field interrupted step) published=$(run_field interrupted published_step)
  [[ $published != "$step" ]] || fail "step $step is published already: nothing is left to show"
  say "  the trainer is killed; averaged is step $step, published is step $published"
  grace_s=$(docker inspect --format '{{.Config.StopTimeout}}' "$ema") term_s=$SECONDS
  quietly compose stop ema
  [[ $(state "$ema" ExitCode) == 0 ]] || fail "the server ended with exit code $(state "$ema" ExitCode)"
  say "  exit code 0, $((SECONDS - term_s)) s after SIGTERM; the grace is $grace_s s"
  up
  published=$(run_field interrupted published_step)
  ((published >= step)) || fail "the server had averaged step $step and published only $published"
  say "  up again: published is step $published"
}

with_evaluation() { # the server gets an evaluation of its own, by a file over the others as docs/guides/evaluation.md has it
  chmod 755 "$folder"
  mkdir "$folder/evaluation"
  echo 'def evaluate(state): return {"tensors": len(state), "loss": 1.0}' >"$folder/evaluation/my_evaluation.py"
  printf '%s\n' 'services:' '  ema:' '    volumes:' "      - $folder/evaluation:/evaluation:ro" >"$folder/evaluation.yml"
  export COMPOSE_FILE=$COMPOSE_FILE:$folder/evaluation.yml EMA_EVALUATE=my_evaluation:evaluate
}

validated() { # by the server itself
  local found
  found=$(server ema validate "demo/$AVERAGE" --again --json | server_python "print(json.load(sys.stdin)['metrics']['loss'])")
  [[ $found == 1.0 ]] || fail "the server's own evaluation says $found"
  say "  the server evaluates with a function that was mounted"
}

demo_beside() { # ends by itself with its table, and leaves the server alone
  demo_compose up --abort-on-container-exit >"$folder/demo.log" 2>&1 || { cat "$folder/demo.log" >&2; fail "the demo"; }
  grep -q "$STEPS steps taken, $STEPS updates applied, 0 gaps" "$folder/demo.log" || fail "the demo printed no table"
  [[ $(container ema) == "$ema" ]] && is_healthy || fail "the demo changed the server"
  say "  the demo ended with its table; the server beside it is untouched"
}

docker info >/dev/null
quietly compose -f docker-compose.yml -f docker-compose.gpu.yml config
build
say "up"
up
contained
say "training and evaluating"
trained
say "downloading $AVERAGE with curl"
download "$folder/first.safetensors"
loads "$folder/first.safetensors"
say "down, and up again"
quietly compose down
export EMA_PUBLISH_EVERY_STEPS=0
with_evaluation
up
download "$folder/second.safetensors"
cmp "$folder/first.safetensors" "$folder/second.safetensors" || fail "the run came back with other weights"
cmp "$folder/first.safetensors.json" "$folder/second.safetensors.json" || fail "the run came back as another version"
say "  the run is still there, byte for byte"
validated
say "the demo beside the server"
demo_beside
say "SIGTERM in the middle of a run"
interrupted
say "all of it held; to remove the images: docker image rm ema-sidecar ema-sidecar-demo"
