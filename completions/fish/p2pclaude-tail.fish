# fish completion for p2pclaude-tail

complete -c p2pclaude-tail -F
complete -c p2pclaude-tail -s f -l follow -d 'go on until the session ends'
complete -c p2pclaude-tail -s n -l last -x -d 'begin with the last N objects'
complete -c p2pclaude-tail -l after -x -d 'begin after this sequence number'
complete -c p2pclaude-tail -l meta -d 'print the envelope around each object'
complete -c p2pclaude-tail -l text -d 'print only what a person would read'
complete -c p2pclaude-tail -s t -l timeout -x -d 'wait so long for a connection and for answers'
complete -c p2pclaude-tail -l bootstrap -x -d 'start from these nodes of the DHT'
complete -c p2pclaude-tail -s v -l verbose -d 'say what is going on'
complete -c p2pclaude-tail -s h -l help -d 'show the usage'
complete -c p2pclaude-tail -l version -d 'show the version'
