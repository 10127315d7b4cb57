# fish completion for p2pclaude-ls

complete -c p2pclaude-ls -F
complete -c p2pclaude-ls -s a -l all -d 'list ended sessions too'
complete -c p2pclaude-ls -s q -l quiet -d 'print ids only'
complete -c p2pclaude-ls -l json -d 'print JSON objects, one a line'
complete -c p2pclaude-ls -l dht -d 'read the session record from the DHT'
complete -c p2pclaude-ls -s t -l timeout -x -d 'wait so long for a connection and for answers'
complete -c p2pclaude-ls -l bootstrap -x -d 'start from these nodes of the DHT'
complete -c p2pclaude-ls -s v -l verbose -d 'say what is going on'
complete -c p2pclaude-ls -s h -l help -d 'show the usage'
complete -c p2pclaude-ls -l version -d 'show the version'
