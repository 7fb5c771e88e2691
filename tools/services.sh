#!/bin/sh
# Starts and stops PostgreSQL and Redis for one machine: by docker compose where that works, else from Debian's packages.
#
#   tools/services.sh up        start what does not run, and say where it is
#   tools/services.sh down      stop what `up` started, and nothing else; what it keeps stays
#   tools/services.sh status    say what runs; the exit code is 1 where one does not
#
# POSTGRES_PORT, REDIS_PORT, POSTGRES_PASSWORD   as in .env.example
# SERVICES        docker or debian: which of the two; not set: docker if it works
# SERVICES_DIR    where the packages' servers keep data, logs and pid files; not set: .services beside this directory
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
dir=${SERVICES_DIR:-$root/.services}
postgres_port=${POSTGRES_PORT:-5432}
redis_port=${REDIS_PORT:-6379}
password=${POSTGRES_PASSWORD:-quiver}

fail() {
	echo "services: $*" >&2
	exit 69
}

# docker compose

compose() {
	docker compose --file "$root/deploy/compose.yaml" "$@"
}

docker_works() {
	docker compose version >/dev/null 2>&1 && docker info >/dev/null 2>&1
}

# Debian's packages

# PostgreSQL refuses to run as root: there its own user runs it, whom the package makes.
as_server() {
	if [ "$(id -u)" = 0 ]; then
		(cd / && runuser -u postgres -- "$@")
	else
		"$@"
	fi
}

postgres_bin() {
	for bin in $(ls -d /usr/lib/postgresql/*/bin 2>/dev/null | sort --version-sort --reverse) "$(dirname "$(command -v initdb || echo .)")"; do
		if [ -x "$bin/initdb" ]; then
			echo "$bin"
			return
		fi
	done
	fail "PostgreSQL is not installed: apt-get install postgresql"
}

is_taken() {
	# Whoever answers, on any address of this machine: a second server would not get the port.
	python3 -c 'import socket, sys
with socket.socket() as s:
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try: s.bind(("127.0.0.1", int(sys.argv[1])))
    except OSError: sys.exit(0)
sys.exit(1)' "$1"
}

postgres_runs() {
	[ -s "$dir/postgres/postmaster.pid" ] && as_server "$bin/pg_ctl" status --pgdata "$dir/postgres" >/dev/null 2>&1
}

# The pid alone would name whoever has it after this machine was started anew.
redis_runs() {
	[ -s "$dir/redis/redis.pid" ] && redis_pid=$(cat "$dir/redis/redis.pid") &&
		grep --quiet redis-server "/proc/$redis_pid/comm" 2>/dev/null &&
		[ "$(readlink "/proc/$redis_pid/cwd")" = "$dir/redis" ]
}

start_postgres() {
	if postgres_runs; then
		return
	fi
	! is_taken "$postgres_port" || fail "port $postgres_port is taken: choose another, make services-up POSTGRES_PORT=5433"
	if [ ! -s "$dir/postgres/PG_VERSION" ]; then
		make_postgres
	fi
	options="-p $postgres_port -c listen_addresses=127.0.0.1 -c unix_socket_directories='$dir/postgres'"
	as_server "$bin/pg_ctl" start --wait --silent --pgdata "$dir/postgres" --log "$dir/postgres/server.log" --options "$options" ||
		fail "PostgreSQL did not start: see $dir/postgres/server.log"
	make_database
}

make_postgres() {
	mkdir -p "$dir/postgres"
	chmod 700 "$dir/postgres"
	if [ "$(id -u)" = 0 ]; then
		chown postgres "$dir/postgres"
	fi
	as_server test -w "$dir/postgres" || fail "the user postgres cannot enter $dir: set SERVICES_DIR to a directory that it can"
	# The directory is its owner's alone, and with it the socket in it; over TCP the password is asked for.
	as_server "$bin/initdb" --pgdata "$dir/postgres" --username postgres --auth-local trust --auth-host scram-sha-256 \
		--encoding UTF8 --locale C.UTF-8 >/dev/null
}

make_database() {
	as_server "$bin/psql" --host "$dir/postgres" --port "$postgres_port" --username postgres --no-psqlrc --quiet \
		--set ON_ERROR_STOP=1 --set password="$password" <<-'END'
		ALTER ROLE postgres PASSWORD :'password';
		SELECT 'CREATE DATABASE quiver' WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = 'quiver')\gexec
	END
}

start_redis() {
	if redis_runs; then
		return
	fi
	command -v redis-server >/dev/null || fail "Redis is not installed: apt-get install redis-server"
	! is_taken "$redis_port" || fail "port $redis_port is taken: choose another, make services-up REDIS_PORT=6380"
	mkdir -p "$dir/redis"
	redis-server --bind 127.0.0.1 --port "$redis_port" --dir "$dir/redis" --daemonize yes --pidfile "$dir/redis/redis.pid" \
		--logfile "$dir/redis/server.log" --maxmemory "${REDIS_MEMORY:-256mb}" --maxmemory-policy allkeys-lru --save 60 1 >/dev/null
	for _ in 1 2 3 4 5 6 7 8 9 10; do
		if [ "$(redis-cli -p "$redis_port" ping 2>/dev/null)" = PONG ]; then
			return
		fi
		sleep 0.5
	done
	fail "Redis did not start: see $dir/redis/server.log"
}

stop_postgres() {
	if postgres_runs; then
		as_server "$bin/pg_ctl" stop --wait --silent --mode fast --pgdata "$dir/postgres"
		echo "PostgreSQL is stopped"
	fi
}

stop_redis() {
	if redis_runs; then
		kill "$redis_pid"
		while [ -d "/proc/$redis_pid" ]; do sleep 0.1; done
		echo "Redis is stopped"
	fi
}

# Both

tell() {
	if [ "$how" = debian ]; then
		postgres_port=$(sed -n 4p "$dir/postgres/postmaster.pid") # of those that run, whatever is said now
		redis_port=$(tr '\0' ' ' <"/proc/$(cat "$dir/redis/redis.pid")/cmdline" | sed 's/.*:\([0-9]*\).*/\1/')
	fi
	shown=$password
	[ "$password" = quiver ] || shown='***'
	cat <<-END
		PostgreSQL  DATABASE_URL=postgresql://postgres:$shown@127.0.0.1:$postgres_port/quiver
		Redis       REDIS_URL=redis://127.0.0.1:$redis_port/0
	END
}

up() {
	if [ "$how" = docker ]; then
		compose up --detach --wait
	else
		mkdir -p "$dir"
		start_postgres
		start_redis
	fi
	tell
}

down() {
	if [ "$how" = docker ]; then
		compose down
	else
		stop_postgres
		stop_redis
	fi
}

status() {
	if [ "$how" = docker ]; then
		[ "$(compose ps --status running --quiet | wc --lines)" = 2 ]
	else
		postgres_runs && redis_runs
	fi && tell
}

how=${SERVICES:-$(if docker_works; then echo docker; else echo debian; fi)}
case $how in
docker) ;;
debian) bin=$(postgres_bin) ;;
*) fail "SERVICES is docker or debian, not $how" ;;
esac
case ${1:-} in
up | down | status) "$1" ;;
*) fail "say up, down or status" ;;
esac
