use std::sync::Weak;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};

use devices::bus::BusDevice;
use devices::pause::{Deferral, Resumable};

use super::*;
use crate::kvm::fake::{FakeVcpu, Step, TIMEOUT, buses_with, sleeping_buses};

/// Starts vCPU threads, and returns the receiver of their idle callbacks.
fn spawn(vcpus: Vec<FakeVcpu>, buses: &Buses) -> (Vcpus, Receiver<()>) {
    let (idle, is_idle) = channel();
    let vcpus = Vcpus::spawn(
        vcpus,
        buses,
        |_| {},
        move || {
            let _ = idle.send(());
        },
    );
    (vcpus.unwrap(), is_idle)
}

/// Waits for the callback after which `vcpus` is idle; earlier callbacks may
/// still be queued.
#[track_caller]
fn wait_until_idle(vcpus: &Vcpus, idle: &Receiver<()>) {
    while !vcpus.is_idle() {
        idle.recv_timeout(TIMEOUT)
            .expect("the vCPUs never were idle");
    }
}

fn computing(index: u32, steps: &Arc<AtomicU32>) -> FakeVcpu {
    let steps = Arc::clone(steps);
    FakeVcpu::new(index, move || {
        steps.fetch_add(1, Ordering::SeqCst);
        Step::Compute
    })
}

#[test]
fn a_pause_does_not_wait_for_a_device_and_is_complete_after_it() {
    let (buses, sleeper) = sleeping_buses();
    let steps = Arc::default();
    let guests = vec![FakeVcpu::that_writes_once(0), computing(1, &steps)];
    let (vcpus, idle) = spawn(guests, &buses);
    vcpus.resume();
    sleeper.wait_until_entered();
    // It returns while the device waits for the test.
    vcpus.request_pause();
    assert!(!vcpus.is_idle());
    sleeper.release();
    wait_until_idle(&vcpus, &idle);
    let paused_at = steps.load(Ordering::SeqCst);
    std::thread::sleep(std::time::Duration::from_millis(5));
    assert_eq!(steps.load(Ordering::SeqCst), paused_at, "a paused vCPU ran");
}

#[test]
fn a_pause_can_be_withdrawn_while_a_device_sleeps() {
    let (buses, sleeper) = sleeping_buses();
    let (vcpus, idle) = spawn(vec![FakeVcpu::new(0, || Step::Write)], &buses);
    vcpus.resume();
    sleeper.wait_until_entered();
    vcpus.request_pause();
    vcpus.resume();
    sleeper.release();
    // The guest runs on, to its next write.
    sleeper.wait_until_entered();
    vcpus.request_pause();
    sleeper.release();
    wait_until_idle(&vcpus, &idle);
}

#[test]
fn no_pause_and_no_resume_is_lost() {
    let steps = Arc::default();
    let (buses, _sleeper) = sleeping_buses();
    let guests = (0..3).map(|index| computing(index, &steps)).collect();
    let (vcpus, idle) = spawn(guests, &buses);
    for _ in 0..200 {
        vcpus.resume();
        vcpus.request_pause();
        wait_until_idle(&vcpus, &idle);
    }
    let before = steps.load(Ordering::SeqCst);
    vcpus.resume();
    while steps.load(Ordering::SeqCst) == before {
        std::thread::yield_now();
    }
}

#[test]
fn a_pause_is_reported_to_each_guest_and_its_start_is_not() {
    let steps: Arc<AtomicU32> = Arc::default();
    let (buses, _sleeper) = sleeping_buses();
    let guests: Vec<_> = (0..3).map(|index| computing(index, &steps)).collect();
    let pauses: Vec<_> = guests.iter().map(|vcpu| Arc::clone(&vcpu.pauses)).collect();
    let (vcpus, idle) = spawn(guests, &buses);
    let reported = || -> Vec<_> {
        pauses
            .iter()
            .map(|count| count.load(Ordering::SeqCst))
            .collect()
    };
    for round in 0..3 {
        let before = steps.load(Ordering::SeqCst);
        vcpus.resume();
        // Each vCPU has left its park when all three have run.
        while steps.load(Ordering::SeqCst) < before + 300
            || reported().iter().sum::<u32>() < 3 * round
        {
            std::thread::yield_now();
        }
        assert_eq!(reported(), [round; 3]);
        vcpus.request_pause();
        wait_until_idle(&vcpus, &idle);
    }
}

/// A device that serves `left` requests, one at a time.
struct Server {
    left: AtomicU32,
    deferral: Deferral,
    /// The first request is being served, and waits for the test.
    entered: AtomicBool,
    go_on: AtomicBool,
}

impl Resumable for Server {
    fn resume(&self) {
        while self.left.load(Ordering::SeqCst) > 0 && !self.deferral.interrupts() {
            self.entered.store(true, Ordering::SeqCst);
            while !self.go_on.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            self.left.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

impl BusDevice for Server {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _: u64, _: &[u8]) {
        self.resume();
    }
}

#[test]
fn work_that_a_pause_interrupts_is_completed_without_another_kick() {
    let pause = Arc::<PauseRequest>::default();
    let server = Arc::new(Server {
        left: AtomicU32::new(1000),
        deferral: pause.deferral(),
        entered: AtomicBool::new(false),
        go_on: AtomicBool::new(false),
    });
    let resumed: Weak<Server> = Arc::downgrade(&server);
    server.deferral.resumes(resumed);
    let buses = Buses {
        pause,
        ..buses_with(Arc::clone(&server) as Arc<dyn BusDevice>)
    };
    let (vcpus, idle) = spawn(vec![FakeVcpu::that_writes_once(0)], &buses);
    vcpus.resume();
    while !server.entered.load(Ordering::SeqCst) {
        std::thread::yield_now();
    }
    vcpus.request_pause();
    server.go_on.store(true, Ordering::SeqCst);
    wait_until_idle(&vcpus, &idle);
    assert_eq!(
        server.left.load(Ordering::SeqCst),
        999,
        "one request's time"
    );
    vcpus.resume();
    while server.left.load(Ordering::SeqCst) > 0 {
        std::thread::yield_now();
    }
}

#[test]
fn a_stop_ends_paused_and_running_vcpus_alike() {
    let steps = Arc::default();
    let (buses, _sleeper) = sleeping_buses();
    for paused in [true, false] {
        let guests = vec![computing(0, &steps), FakeVcpu::new(1, || Step::PowerOff)];
        let (vcpus, idle) = spawn(guests, &buses);
        vcpus.resume();
        if paused {
            vcpus.request_pause();
            wait_until_idle(&vcpus, &idle);
        }
        vcpus.request_stop();
        wait_until_idle(&vcpus, &idle);
        drop(vcpus);
    }
}
