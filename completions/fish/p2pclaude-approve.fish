# fish completion for p2pclaude-approve

complete -c p2pclaude-approve -F
complete -c p2pclaude-approve -l allow -x -d 'let this request\'s tool run'
complete -c p2pclaude-approve -l deny -x -d 'deny this request'
complete -c p2pclaude-approve -s m -l message -x -d 'the reason of the denial'
complete -c p2pclaude-approve -l answer -x -d 'answer this request with the JSON on stdin'
complete -c p2pclaude-approve -s f -l follow -d 'go on with new requests as they come'
complete -c p2pclaude-approve -l filter -r -F -d 'let this command decide'
complete -c p2pclaude-approve -l filter-timeout -x -d 'end a filter that takes so long'
complete -c p2pclaude-approve -s t -l timeout -x -d 'wait so long for a connection and for answers'
complete -c p2pclaude-approve -l bootstrap -x -d 'start from these nodes of the DHT'
complete -c p2pclaude-approve -s v -l verbose -d 'say what is going on'
complete -c p2pclaude-approve -s h -l help -d 'show the usage'
complete -c p2pclaude-approve -l version -d 'show the version'
