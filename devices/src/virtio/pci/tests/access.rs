//! Accesses by several vCPUs: one access of a register's width is one access to
//! the model, in the BAR and in configuration space.

use std::thread;

use super::*;

/// Number of writes of each value to each register.
const TURNS: usize = 5_000;
const QUEUE_DESC: u64 = 32;

/// Writes `values` in turn while another thread reads; checks that every read
/// is one of them.
fn assert_whole<const N: usize>(
    values: [[u8; N]; 2],
    write: impl Fn(&[u8; N]) + Sync,
    read: impl Fn() -> [u8; N] + Sync,
) {
    write(&values[0]);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            for turn in 0..TURNS {
                write(&values[turn % 2]);
            }
            done.store(true, Ordering::Release);
        });
        while !done.load(Ordering::Acquire) {
            let seen = read();
            assert!(values.contains(&seen), "{seen:x?}");
        }
    });
}

#[test]
fn access_to_the_bar_is_never_torn() {
    let (driver, _) = recording();
    for at in [QUEUE_DESC, TABLE, TABLE + 16] {
        assert_whole(
            [[0x10; 8], [0x20; 8]],
            |value| driver.write(at, value),
            || driver.read::<8>(at),
        );
    }
    for at in [QUEUE_DESC + 4, TABLE + 8] {
        assert_whole(
            [[0x10; 4], [0x20; 4]],
            |value| driver.write(at, value),
            || driver.read::<4>(at),
        );
    }
}

#[test]
fn access_to_configuration_space_is_never_torn() {
    let (driver, _) = recording();
    let [low, high] = [driver.config::<1>(0x10)[0], 0x40];
    let bar = |byte: u8| [low, 0, byte, byte, high, 0, 0, 0];
    assert_whole(
        [bar(0), bar(0x20)],
        |value| driver.set_config_bytes(0x10, value),
        || driver.config::<8>(0x10),
    );
}

#[test]
fn access_window_reads_the_register_that_it_names() {
    let (driver, _) = recording();
    let window = driver.window();
    driver.set_config_bytes(window + 12, &[4, 0, 0, 0]);
    // The message data of two entries; the window always selects one of them.
    let [first, second] = [TABLE + 8, TABLE + 24];
    driver.write32(first, 0x1111_1111);
    driver.write32(second, 0x2222_2222);
    let name = |at: u64| driver.set_config_bytes(window + 8, &at.to_le_bytes()[..4]);
    assert_whole(
        [[0x11; 4], [0x22; 4]],
        |value| name(if value[0] == 0x11 { first } else { second }),
        || driver.config::<4>(window + 16),
    );
}

#[test]
fn device_configuration_is_asked_once_for_each_access() {
    let (driver, device) = recording();
    device.log().config = [1, 2, 3, 4, 5, 6, 7, 8];
    for (read, expected) in [
        (
            driver.read::<8>(DEVICE).to_vec(),
            vec![1, 2, 3, 4, 5, 6, 7, 8],
        ),
        (driver.read::<4>(DEVICE + 4).to_vec(), vec![5, 6, 7, 8]),
        (driver.read::<2>(DEVICE + 2).to_vec(), vec![3, 4]),
    ] {
        assert_eq!(read, expected);
    }
    assert_eq!(device.log().config_reads, 3);
}
