# Sourced by the other scripts: the deepspeed launcher, with signals left to the training processes.
#
# The launcher answers Ctrl-C itself: it returns before the run has saved, with a traceback and an exit code of its own.
# Here it runs in a process group of its own, out of reach of Ctrl-C. This shell passes signals on to the training
# processes: a run saves at the next step boundary and leaves with exit code 75, which is then the launcher's too.

children_of() { cat /proc/"$1"/task/*/children 2>/dev/null || true; }

# pass_on SIGNAL LAUNCHER: to the processes that the launcher has started; it has one process in between.
pass_on() {
  local node rank found=
  interrupted=yes
  for node in $(children_of "$2"); do
    for rank in $(children_of "$node"); do
      found=yes
      kill -s "$1" "$rank" 2>/dev/null || true
    done
  done
  if [ -z "$found" ]; then kill -s TERM -- "-$2" 2>/dev/null || true; fi
}

# run_deepspeed WORDS: as `deepspeed WORDS`
run_deepspeed() {
  local launcher signal code interrupted=yes
  set -m
  deepspeed "$@" </dev/null &
  launcher=$!
  set +m
  for signal in INT TERM USR1; do trap "pass_on $signal $launcher" "$signal"; done
  while [ -n "$interrupted" ]; do # a signal ends `wait` before its time
    interrupted=
    code=0
    wait "$launcher" || code=$?
  done
  trap - INT TERM USR1
  return "$code"
}
