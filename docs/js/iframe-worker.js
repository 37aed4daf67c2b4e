// The site's search runs in a web worker, which browsers do not start for pages that are opened as files. There it runs in a hidden
// frame instead: what the worker posts goes to this page, what this page posts goes to the frame once its script is loaded.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.appendChild(frame);
      const inside = frame.contentWindow;
      inside.importScripts = (...urls) =>
        urls.reduce((before, address) => before.then(() => Worker.loaded(inside, address)), Promise.resolve());
      inside.postMessage = inside.eval("(data) => parent.postMessage(data, '*')");
      this.frame = frame;
      this.ready = Worker.loaded(inside, url);
      addEventListener("message", (event) => {
        if (event.source === inside) {
          event.stopImmediatePropagation();
          const copy = new MessageEvent("message", { data: event.data });
          this.dispatchEvent(copy);
          if (this.onmessage) this.onmessage(copy);
        }
      });
    }

    static loaded(inside, address) {
      return new Promise((resolve) => {
        const script = inside.document.createElement("script");
        script.src = address;
        script.addEventListener("load", resolve);
        inside.document.body.appendChild(script);
      });
    }

    postMessage(data) {
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })));
    }

    terminate() {
      this.frame.remove();
    }
  };
}
