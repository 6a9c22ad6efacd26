-- Replaces nmap's nse_main.lua and loads it afterwards, so that scripts can reach only the scanned addresses.
-- A script that connects to another address gets an error, as from a network that does not answer.

local cnse, rules = ...
local nmap = require "nmap"
local targets = {}

local function confined (method)
  return function (socket, host, ...)
    local address = type(host) == "table" and (host.ip or host.targetname) or host
    if not targets[address] then
      return nil, "the address is not being scanned"
    end
    return method(socket, host, ...)
  end
end

local function refused ()
  error("scripts may not call this function")
end

-- Patch before the engine is loaded, because libraries and scripts keep references to these functions.
local methods = debug.getmetatable(nmap.new_socket()).__index
methods.connect = confined(methods.connect)
methods.sendto = confined(methods.sendto)
methods.pcap_open = refused -- captures packets of other connections
nmap.new_dnet = refused -- sends arbitrary packets
nmap.dnet.new = refused
nmap.add_targets = refused
nmap.resolve = function () return false, "names are not resolved" end
nmap.get_dns_servers = function () return {} end
os.execute = refused
io.popen = refused

local kind, library = cnse.fetchfile_absolute("nselib/stdnse.lua")
assert(kind == "file", "nmap's own scripting library is not installed")
local main = assert(loadfile((library:gsub("nselib/stdnse%.lua$", "nse_main.lua"))))(cnse, rules)

return function (hosts, ...)
  targets = {}
  for _, host in ipairs(hosts) do
    targets[host.ip] = true
  end
  return main(hosts, ...)
end
