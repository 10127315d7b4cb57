# fish completion for p2pclaude-stop

complete -c p2pclaude-stop -F
complete -c p2pclaude-stop -l all -d 'stop every session'
complete -c p2pclaude-stop -l turn -d 'end what the session is doing, not the session'
complete -c p2pclaude-stop -s t -l timeout -x -d 'wait so long for a connection and for answers'
complete -c p2pclaude-stop -l bootstrap -x -d 'start from these nodes of the DHT'
complete -c p2pclaude-stop -s v -l verbose -d 'say what is going on'
complete -c p2pclaude-stop -s h -l help -d 'show the usage'
complete -c p2pclaude-stop -l version -d 'show the version'
