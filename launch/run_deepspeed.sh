# Sourced by the other scripts: the deepspeed launcher, with signals sent to the training processes only.
#
# At Ctrl-C, the launcher itself would end before the run has saved, with a traceback and an exit code of its own. Here
# it runs in its own process group, which Ctrl-C does not reach. This shell passes signals on to the training
# processes. A run then saves at the next step boundary and ends with exit code 75, and so does the launcher.

children_of() { cat /proc/"$1"/task/*/children 2>/dev/null || true; }

# pass_on SIGNAL LAUNCHER: send a signal to the ranks. There is one process between the launcher and them.
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

# run_deepspeed WORDS: like `deepspeed WORDS`
run_deepspeed() {
  local launcher signal code interrupted=yes
  set -m
  deepspeed "$@" </dev/null &
  launcher=$!
  set +m
  for signal in INT TERM USR1; do trap "pass_on $signal $launcher" "$signal"; done
  while [ -n "$interrupted" ]; do # a signal ends `wait` early
    interrupted=
    code=0
    wait "$launcher" || code=$?
  done
  trap - INT TERM USR1
  return "$code"
}
