# Sourced by the launchers. as_child COMMAND... runs it so that SIGTERM, Ctrl-C and SIGUSR1 reach it as SIGTERM also
# where only this shell gets them, and answers with its exit code once it has ended; 143 where the signal ended it.

STOPPED=143
trap 'exit "$STOPPED"' TERM INT USR1 # between commands

as_child() {
    local code=0 asked= child
    "$@" &
    child=$!
    trap 'asked=yes; kill -TERM "$child" 2>/dev/null || true' TERM INT USR1
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do # the signal ended the wait, not the command
        code=0
        wait "$child" || code=$?
    done
    trap 'exit "$STOPPED"' TERM INT USR1
    case "$asked$code" in yes130 | yes138) code=$STOPPED ;; esac
    return "$code"
}
