#!/bin/sh
# Records what real nmap writes about hosts of every kind, in a separate network namespace: no packet leaves this machine.
# Needs root, iproute2, iptables, python3 and nmap. Usage: ./record.sh
set -eu
[ "${1:-}" = inside ] || exec unshare --net --pid --fork --kill-child "$0" inside
cd "$(dirname "$0")"

ip link set lo up
ip link add veth0 type veth peer name veth1 # the other end has no address: its neighbours are down
ip addr add 10.77.0.1/24 dev veth0
ip link set veth0 up
ip link set veth1 up
ip netns add recorded-router # answers for a network that is not there
trap 'ip netns del recorded-router' EXIT
ip link add up0 type veth peer name down0 netns recorded-router
ip addr add 10.66.0.1/24 dev up0
ip link set up0 up
ip -n recorded-router addr add 10.66.0.2/24 dev down0
ip -n recorded-router link set down0 up
ip route add 10.88.0.0/24 via 10.66.0.2
ip netns exec recorded-router sysctl -qw net.ipv4.ip_forward=1 net.ipv4.icmp_ratelimit=0
ip -n recorded-router route add prohibit 10.88.0.0/24
iptables -A INPUT -d 127.9.5.0/24 -j DROP
iptables -A INPUT -d 127.9.6.0/24 -j REJECT --reject-with icmp-host-unreachable

python3 - <<'PYTHON' &
import socket, threading, time

BANNERS = {  # what strangers say: control characters, terminal escapes, a right-to-left override, markup, broken UTF-8
    21: b"220 \x01\x1b[31mred\x1b[0m \xe2\x80\xae evil <script>alert(1)</script> \xff\xfe ]]> ready.\r\n",
    22: b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n",
    25: b"220 ma\x01il\x1b.x ESMTP Postfix (Debian)\r\n",
}


def answer(listener, banner):
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=talk, args=(connection, banner), daemon=True).start()


def talk(connection, banner):
    try:
        connection.sendall(banner)
        connection.settimeout(2)
        connection.recv(4096)
    except OSError:
        pass
    connection.close()


def listen(address, port, banner=b""):
    listener = socket.create_server((address, port))
    threading.Thread(target=answer, args=(listener, banner), daemon=True).start()


for port, banner in BANNERS.items():
    listen("127.9.1.1", port, banner)
for port in range(8000, 8060):
    listen("127.9.1.2", port)
time.sleep(300)
PYTHON
sleep 1

scan() {
    name=$1
    shift
    echo "$name"
    nmap -v -n -oX "$name.xml" --stats-every 1s --privileged "$@" >/dev/null 2>&1
}
scan closed -sS -p 1-100 -- 127.9.1.8/30
scan listed_closed -sT -p 1-10 -- 127.9.1.8/31
scan many_open -sS -p 8000-8099 -- 127.9.1.2/31
scan versions -sS -sV --version-intensity 2 --script banner -p 20-25 -- 127.9.1.1
scan silent -Pn -sS -p 1-100 --max-retries 1 -- 127.9.5.0/31 127.9.1.8
scan unreachable -Pn -sT -p 1-30 -- 127.9.6.1
scan prohibited -Pn -sS -p 1-3 -- 10.88.0.1 127.9.1.8
scan prohibited_many -Pn -sS -p 1-60 -- 10.88.0.1
scan prohibited_udp -Pn -sU -p 1-3 -- 10.88.0.1 127.9.1.8
scan timed_out -Pn -sS -p 1-100 --host-timeout 1s -- 127.9.5.1 127.9.1.8
scan down -sS -p 22,80 -- 10.77.0.1 10.77.0.8/30
scan udp -Pn -sU -p 1-60 --max-retries 0 -- 127.9.5.1 127.9.1.8
scan udp_listed -Pn -sS -sU -p T:22,U:1-5 --max-retries 0 -- 127.9.5.1
scan skipped -sS -p 22 -- 10.89.0.0/31 127.9.1.8
scan os -sS -O -p 1-25 -- 127.9.1.1
scan ipv6 -6 -sS -p 22,80 -- ::1/128
