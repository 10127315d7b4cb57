# fish completion for p2pclaude-ping

complete -c p2pclaude-ping -F
complete -c p2pclaude-ping -s c -l count -x -d 'ask so many times'
complete -c p2pclaude-ping -s t -l timeout -x -d 'wait so long for a connection and for answers'
complete -c p2pclaude-ping -l bootstrap -x -d 'start from these nodes of the DHT'
complete -c p2pclaude-ping -s v -l verbose -d 'say what is going on'
complete -c p2pclaude-ping -s h -l help -d 'show the usage'
complete -c p2pclaude-ping -l version -d 'show the version'
