# A driver: folders below $BASE that a symbolic link leads to.
name() { expr "$1" : '.*"name":"\([A-Za-z0-9_.-]*\)"'; }
ok() { echo "{\"status\":\"Success\"$1}"; exit 0; }
fail() { echo "{\"status\":\"Failure\",\"message\":\"$1\"}"; exit 1; }
case $1 in
init) ok ',"capabilities":{"attach":false}' ;;
create) mkdir -p "$BASE/$(name "$2")" && ok ',"options":{"created":"true"}' ;;
delete) rmdir "$BASE/$(name "$2")" && ok ;;
mount)
	[ ! -e "$2" ] || fail "'$2' is not free"
	ln -s "$BASE/$(name "$4")" "$2" && ok ;;
unmount) rm "$2" && ok ;;
*) echo '{"status":"Not supported"}'; exit 1 ;;
esac
fail "$1 did not work"
