//! Sequences of requests to the server.

use crate::support::{Connection, Machine};
use api::Limits;
use std::net::Shutdown;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;
use vmm::action::{Action, Lifecycle, Query, Reply};

const BOOT: &str = r#"{"kernel_image_path": "vmlinuz"}"#;
const START: &str = r#"{"action_type": "InstanceStart"}"#;

/// Short timeouts, for tests whose result does not depend on their length.
fn impatient() -> Limits {
    Limits {
        request: Duration::from_millis(50),
        idle: Duration::from_millis(50),
        answer: Duration::from_millis(50),
        drain: Duration::from_millis(50),
        ..Limits::default()
    }
}

#[test]
fn a_machine_is_configured_started_paused_resumed_and_stopped() {
    let mut machine = Machine::new(Limits::default());
    let put = |path, body| machine.request("PUT", path, body);
    let done = (204, String::new());
    let early = put("/actions", START);
    assert_eq!(early.0, 400);
    assert!(early.1.contains("boot-source"), "{}", early.1);

    assert_eq!(put("/boot-source", BOOT), done);
    let config = r#"{"vcpu_count": 2, "mem_size_mib": 256}"#;
    assert_eq!(put("/machine-config", config), done);
    let patch = machine.request("PATCH", "/machine-config", r#"{"mem_size_mib": 300}"#);
    assert_eq!(patch, done);
    assert_eq!(put("/iommu", r#"{"model": "virtio-iommu"}"#), done);
    let drive = r#"{"drive_id": "a", "path_on_host": "x", "is_root_device": true}"#;
    assert_eq!(put("/drives/a", drive), done);
    let net = r#"{"iface_id": "n", "host_dev_name": "tap0"}"#;
    assert_eq!(put("/network-interfaces/n", net), done);
    assert_eq!(put("/vsock", r#"{"guest_cid": 3}"#), done);
    assert_eq!(put("/entropy", "{}"), done);

    let (status, body) = machine.request("GET", "/vm/config", "");
    assert_eq!(status, 200);
    let config: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!(config["machine-config"]["mem_size_mib"], 300);
    assert_eq!(config["machine-config"]["vcpu_count"], 2);
    assert_eq!(config["iommu"]["model"], "virtio-iommu");
    vmm::config::VmConfig::from_json(&body).unwrap();

    assert_eq!(put("/actions", START), done);
    let late = put("/drives/a", drive);
    assert_eq!(late.0, 400);
    assert!(late.1.contains("drives") && late.1.contains("running"));
    let vm = |state: &str| machine.request("PATCH", "/vm", &format!(r#"{{"state": "{state}"}}"#));
    let state = || machine.request("GET", "/", "").1;
    assert_eq!(vm("Paused"), done);
    assert!(state().contains(r#""state":"Paused""#));
    assert_eq!(vm("Resumed"), done);
    assert!(state().contains(r#""state":"Running""#));
    assert_eq!(put("/actions", r#"{"action_type": "InstanceStop"}"#), done);

    let seen = machine.stop();
    assert_eq!(seen.last(), Some(&Action::Lifecycle(Lifecycle::Stop)));
    assert!(!machine.path().exists());
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let machine = Machine::new(Limits::default());
    let mut connection = machine.connect();
    let mut all = Vec::new();
    for _ in 0..50 {
        all.extend_from_slice(b"GET /version HTTP/1.1\r\n\r\n");
        all.extend_from_slice(b"GET /nothing HTTP/1.1\r\n\r\n");
        all.extend_from_slice(b"PUT /entropy HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}");
    }
    connection.send(&all);
    for _ in 0..50 {
        assert_eq!(connection.response().0, 200);
        assert_eq!(connection.response().0, 404);
        assert_eq!(connection.response().0, 204);
    }
}

#[test]
fn a_request_may_arrive_byte_by_byte() {
    let machine = Machine::new(Limits::default());
    let mut connection = machine.connect();
    for byte in b"PUT /entropy HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}" {
        connection.send(&[*byte]);
    }
    assert_eq!(connection.response().0, 204);
}

#[test]
fn a_client_that_half_closes_still_gets_its_answers() {
    let machine = Machine::new(Limits::default());
    let mut connection = machine.connect();
    connection.send(b"GET /version HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\n\r\n");
    connection.stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(connection.response().0, 200);
    assert_eq!(connection.response().0, 200);
    assert!(connection.rest().is_empty());
}

#[test]
fn a_client_that_expects_continue_receives_it() {
    let machine = Machine::new(Limits::default());
    let mut connection = machine.connect();
    connection.send(b"PUT /entropy HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n");
    assert_eq!(connection.response().0, 100);
    connection.send(b"{}");
    assert_eq!(connection.response().0, 204);
}

#[test]
fn invalid_requests_are_answered_and_closed() {
    let machine = Machine::new(Limits::default());
    let huge = format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(9000));
    let hostile: [(&[u8], u16); 6] = [
        (b"\x00\x01\x02\x03\r\n\r\n", 400),
        (
            b"PUT / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx",
            400,
        ),
        (
            b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            501,
        ),
        (b"PUT / HTTP/1.1\r\nContent-Length: 51201\r\n\r\n", 413),
        (huge.as_bytes(), 431),
        (b"GET / HTTP/1.1\r\nExpect: magic\r\n\r\n", 417),
    ];
    for (bytes, status) in hostile {
        let mut connection = machine.connect();
        connection.send(bytes);
        let (got, body) = connection.response();
        assert_eq!(got, status, "{}", String::from_utf8_lossy(bytes));
        assert!(body.contains("fault_message"));
        connection.stream.shutdown(Shutdown::Write).unwrap();
        assert!(connection.rest().is_empty());
    }
}

#[test]
fn a_body_of_the_greatest_size_is_read_whole() {
    let machine = Machine::new(Limits::default());
    let body = format!("{{{}}}", " ".repeat(51_198));
    assert_eq!(machine.request("PUT", "/entropy", &body).0, 204);
}

#[test]
fn connections_beyond_the_limit_are_answered_503_until_others_close() {
    let limits = Limits {
        connections: 2,
        keep: Duration::from_secs(3600),
        drain: Duration::from_millis(10),
        ..Limits::default()
    };
    let machine = Machine::new(limits);
    let version = |connection: &mut Connection| {
        connection.send_request("GET", "/version", "");
        connection.response().0
    };
    let mut kept = [machine.connect(), machine.connect()];
    assert_eq!(kept.each_mut().map(version), [200, 200]);
    for _ in 0..40 {
        let mut refused = machine.connect();
        assert_eq!(refused.response().0, 503);
    }
    assert_eq!(kept.each_mut().map(version), [200, 200]);
    drop(kept);
    let mut attempts = 0;
    while {
        let mut connection = machine.connect();
        // The time at which the server notices the other disconnections is unknown.
        connection.send(b"GET /version HTTP/1.1\r\nConnection: close\r\n\r\n");
        connection.response().0 != 200
    } {
        attempts += 1;
        assert!(attempts < 1000, "no room came back");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn half_open_connections_make_room_for_new_ones_the_oldest_first() {
    let machine = Machine::new(Limits::default());
    let mut served = machine.connect();
    served.send_request("GET", "/version", "");
    assert_eq!(served.response().0, 200);
    let mut half_open: Vec<_> = (0..40)
        .map(|number| {
            let mut connection = machine.connect();
            if number % 2 == 0 {
                connection.send(b"GET /ver");
            }
            connection
        })
        .collect();
    for _ in 0..3 {
        assert_eq!(machine.request("GET", "/version", "").0, 200);
    }
    // The oldest are closed without a response, as none of them sent a request.
    for connection in &mut half_open[..6] {
        assert!(connection.rest().is_empty());
    }
    // The newest can still complete its request, and one that was served stays.
    let newest = half_open.last_mut().unwrap();
    newest.send(b"GET /version HTTP/1.1\r\n\r\n");
    assert_eq!(newest.response().0, 200);
    served.send_request("GET", "/version", "");
    assert_eq!(served.response().0, 200);
}

#[test]
fn served_connections_without_a_request_make_room_too() {
    let limits = Limits {
        connections: 2,
        keep: Duration::ZERO,
        ..Limits::default()
    };
    let machine = Machine::new(limits);
    let mut kept: Vec<_> = (0..2)
        .map(|_| {
            let mut connection = machine.connect();
            connection.send_request("GET", "/version", "");
            assert_eq!(connection.response().0, 200);
            connection
        })
        .collect();
    assert_eq!(machine.request("GET", "/version", "").0, 200);
    assert!(kept[0].rest().is_empty());
}

#[test]
fn a_connection_that_waits_for_the_machine_is_not_closed_for_another() {
    let (release, released) = mpsc::channel::<()>();
    let (asked, is_asked) = mpsc::channel();
    let limits = Limits {
        connections: 1,
        keep: Duration::ZERO,
        ..Limits::default()
    };
    let machine = Machine::with_controller(limits, move |inbox| {
        let call = inbox.wait().unwrap();
        asked.send(()).unwrap();
        let _ = released.recv();
        call.answer(Ok(Reply::Done));
        Vec::new()
    });
    let mut waiting = machine.connect();
    waiting.send_request("PATCH", "/vm", r#"{"state": "Paused"}"#);
    is_asked.recv().unwrap();
    let mut refused = machine.connect();
    assert_eq!(refused.response().0, 503);
    release.send(()).unwrap();
    assert_eq!(waiting.response().0, 204);
}

#[test]
fn slow_and_idle_clients_are_disconnected() {
    let machine = Machine::new(impatient());
    let mut slow = machine.connect();
    slow.send(b"GET /ver");
    assert_eq!(slow.response().0, 408);
    assert!(slow.rest().is_empty());
    assert!(machine.connect().rest().is_empty());
}

#[test]
fn a_machine_that_does_not_answer_delays_no_other_request() {
    let (release, released) = mpsc::channel::<()>();
    let machine = Machine::with_controller(impatient(), move |inbox| {
        let held = inbox.wait();
        let _ = released.recv();
        let mut seen = Vec::new();
        drop(held);
        while let Some(call) = inbox.wait() {
            seen.push(call.action.clone());
            call.answer(Ok(Reply::Version("x".to_owned())));
        }
        seen
    });
    let (status, body) = machine.request("GET", "/version", "");
    assert_eq!(status, 503);
    assert!(body.contains("did not answer"), "{body}");
    // A request that does not need the machine is answered at the same time.
    assert_eq!(machine.request("GET", "/nothing", "").0, 404);
    release.send(()).unwrap();
    assert_eq!(machine.request("GET", "/version", "").0, 200);
}

#[test]
fn requests_to_an_ended_machine_report_its_end() {
    let machine = Machine::with_controller(Limits::default(), |inbox| {
        drop(inbox.wait());
        Vec::new()
    });
    let (status, body) = machine.request("GET", "/version", "");
    assert_eq!((status, body.contains("ended")), (503, true), "{body}");
    let (status, body) = machine.request("GET", "/version", "");
    assert_eq!((status, body.contains("ended")), (503, true), "{body}");
}

#[test]
fn a_response_in_progress_is_sent_before_the_server_ends() {
    let (asked, is_asked) = mpsc::channel();
    let mut machine = Machine::with_controller(Limits::default(), move |inbox| {
        let call = inbox.wait().unwrap();
        asked.send(()).unwrap();
        // The server starts to end at about this time.
        thread::sleep(Duration::from_millis(20));
        call.answer(Ok(Reply::Done));
        vec![Action::Query(Query::Version)]
    });
    let mut connection = machine.connect();
    connection.send_request("PUT", "/actions", r#"{"action_type": "InstanceStop"}"#);
    is_asked.recv().unwrap();
    machine.stop();
    assert_eq!(connection.response().0, 204);
    assert!(connection.rest().is_empty());
}

#[test]
fn metrics_are_prometheus_text_with_the_servers_own() {
    let machine = Machine::new(Limits::default());
    machine.request("GET", "/nothing", "");
    let (status, text) = machine.request("GET", "/metrics", "");
    assert_eq!(status, 200);
    assert!(text.contains("\nportcullis_up 1\n"), "{text}");
    assert!(
        text.contains("portcullis_api_responses_total{code=\"404\"} 1\n"),
        "{text}"
    );
}

#[test]
fn a_client_that_never_reads_is_disconnected() {
    let limits = Limits {
        response: Duration::from_millis(50),
        ..Limits::default()
    };
    let machine = Machine::new(limits);
    let mut greedy = machine.connect();
    greedy.stream.set_nonblocking(true).unwrap();
    let request = b"GET /vm/config HTTP/1.1\r\n\r\n".repeat(100);
    // The server stops reading while its response does not fit; then this side's buffer fills.
    let refused = (0..100_000).find_map(|_| {
        use std::io::Write;
        let error = greedy.stream.write(&request).err()?;
        if error.kind() != std::io::ErrorKind::WouldBlock {
            return Some(error);
        }
        thread::sleep(Duration::from_millis(1));
        None
    });
    assert!(refused.is_some(), "the connection was never closed");
    assert_eq!(machine.request("GET", "/version", "").0, 200);
}
