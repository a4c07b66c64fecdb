// Runs an explorer on a page that has no kernel: the module comes from a Blob, the model is a plain object.
const read = (part) => JSON.parse(document.getElementById("NMLIB_ID-" + part).textContent);
const values = read("values");
const handlers = {};
const model = {
  get: (name) => values[name],
  set: (name, value) => {
    values[name] = value;
    (handlers["change:" + name] || []).forEach((call) => call());
  },
  save_changes: () => {},
  send: () => {},
  on: (event, call) => (handlers[event] ||= []).push(call),
  off: (event, call) => {
    handlers[event] = (handlers[event] || []).filter((other) => call && other !== call);
  },
};
const address = URL.createObjectURL(new Blob([read("module")], { type: "text/javascript" }));
const { default: explorer } = await import(address);
URL.revokeObjectURL(address);
explorer.render({ model, el: document.getElementById("NMLIB_ID") });
